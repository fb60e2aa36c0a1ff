"""One script a figure or table, benchmarks, workloads, plots. Knows everything; nobody knows it."""
