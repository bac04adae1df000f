"""Kernel side: C sources and, once built, the objects `flow.bpf.o` and `counter.bpf.o`."""
