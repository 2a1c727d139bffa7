"""Engines: how the trained module is sharded, stepped and saved, behind one small protocol."""
