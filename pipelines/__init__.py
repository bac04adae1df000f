"""Where the rooms are put together: configuration, logs, metrics, commands."""
