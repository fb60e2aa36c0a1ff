"""What experiments share: settings, models, workloads, machines, results."""
