"""Experts that a capture could not trace as they are written: adapters by class, sparsec's own and registered ones."""
