"""Flows to windows to host graphs. Opens no socket, imports no Kafka."""
