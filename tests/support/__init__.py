"""What the tests share: small and random networks, masks, and the check that two modules compute the same."""
