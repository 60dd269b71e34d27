"""What is known about channels: demand, constants, labels, segments, figures; each computed from a program alone."""
