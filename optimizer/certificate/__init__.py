"""Certificates: that a package's outputs agree with a reference, on which inputs, and how closely."""

from optimizer.certificate.certify import certify
from optimizer.certificate.inputs import make_inputs

__all__ = ["certify", "make_inputs"]
