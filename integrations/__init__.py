"""Adapters to simulation engines and analysis packages, one engine per module."""
