"""How the tables came to be what they are: one step a file, each with its way back. Alembic reads this folder."""
