"""Other engines beside this one on the same work: `make peers`."""
