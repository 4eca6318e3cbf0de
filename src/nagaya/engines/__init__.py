"""Engines: what boots a machine. Siblings never import each other."""
