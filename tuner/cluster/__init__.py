"""Dask, both sides: the connection of a coordinator and the workers that train."""
