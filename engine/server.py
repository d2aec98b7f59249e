"""Entry of `python -m engine.server`. Run it with -m: as a script, its folder would hide the package `server`."""

if __name__ == "__main__":
    from server.cli import main

    raise SystemExit(main())
