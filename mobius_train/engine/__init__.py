"""Engines: sharding, stepping and saving of the trained module behind one small protocol."""
