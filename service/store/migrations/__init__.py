"""How the tables came to be what they are: one step a file, each with its way back. Alembic reads this folder.

A change of `service.store.schema` comes with a step in ``versions``, which names its types itself, because the code
goes on changing and the past does not. A step runs inside one transaction with all the others, on both databases; on
SQLite a column is changed with ``batch_alter_table``. A test holds that the steps give what the code declares, and
that each goes back.
"""
