"""Sensor side: from the XDP program to Arrow record batches. Imports no torch."""
