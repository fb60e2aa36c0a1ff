"""What people type: `fluxmoe COMMAND`."""
