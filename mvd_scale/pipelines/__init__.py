"""Pipelines: stages in order, each resumable; the YAML files that come with the package."""
