"""``python -m service``: the command line ``syncbn``, where the script of that name is not on the path."""

from service.commands import main

if __name__ == "__main__":
    main()
