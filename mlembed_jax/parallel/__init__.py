"""Devices and processes: the mesh, what each holds, and what they do together."""
