"""The named runs: one TOML recipe each, and the schema that refuses what it does not know."""
