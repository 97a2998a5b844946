"""Codes below a grid's distortion: how their values are read back, and the rotation that makes a matrix fit for them."""
