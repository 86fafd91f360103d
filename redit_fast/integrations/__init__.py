"""redit-fast inside other trainers, one module a host. Each imports its host when it is imported, and nothing else of
the package imports it: `import redit_fast` patches nothing."""
