"""Gate with a GPU: `make gpu`. Its parts run without one, at tiny sizes, in the normal tests."""
