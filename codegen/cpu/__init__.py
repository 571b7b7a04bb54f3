"""Generates C++ for the CPU, and compiles it."""
