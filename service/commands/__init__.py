"""The command line ``syncbn``: one file for each family of commands."""

from service.commands.program import main

__all__ = ["main"]
