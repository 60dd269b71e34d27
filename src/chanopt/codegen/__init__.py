"""From the IR back to PyTorch."""
