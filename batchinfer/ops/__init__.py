"""The device boundary: the Backend protocol, the table of backends, and what the machine offers.

Above this package no file names a device, an instruction set or a backend. A backend is chosen once, when a model is
loaded (`choose.load_backend`), and handed to the decoder, its layers and the runner; weights stay with the backend that
packed them. `devices` imports no torch, so that a job file is checked without it.
"""
