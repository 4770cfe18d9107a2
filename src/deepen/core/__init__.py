"""What everything else stands on: the protocol, values, configuration, the registry, files and errors."""
