"""Engines under workloads and budgets, ours and others."""
