"""`optimizer targets`."""

from __future__ import annotations

import click


@click.command(name="targets")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(as_json: bool) -> None:
    """List the hardware targets, and how this machine can execute each."""
    import targets
    from optimizer.cli.console import print_table
    from optimizer.cli.plain_text import print_json
    from targets.execution import how_executed

    known = [targets.get(name) for name in targets.names()]
    ways = {target.name: how_executed(target) for target in known}
    best = next((target.name for target in known if target.device == "cpu" and ways[target.name] == "native"), None)
    if as_json:
        print_json(
            [
                {
                    "name": target.name,
                    "description": target.description,
                    "architecture": target.architecture,
                    "features": list(target.features),
                    "gpu_architectures": list(target.gpu_architectures),
                    "executed": ways[target.name],
                    "host": target.name == best,
                }
                for target in known
            ]
        )
        return
    rows = [
        (target.name + (" (host)" if target.name == best else ""), target.description, ways[target.name])
        for target in known
    ]
    print_table("targets", ("name", "description", "executed here"), rows)
