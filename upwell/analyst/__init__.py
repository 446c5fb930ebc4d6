"""Questions on tables: sources, schema, linking, plans, SQL, results."""
