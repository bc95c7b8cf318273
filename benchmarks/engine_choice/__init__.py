"""Engines for Hessian-vector products on twelve kinds of network."""
