"""Workflows: from a TOML file to a report, in resumable stages."""
