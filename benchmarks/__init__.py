"""Benchmarks: a zoo of networks, the mask protocol, a peer, a sweep for correctness and copies, speed."""
