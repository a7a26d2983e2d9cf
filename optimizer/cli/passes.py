"""`optimizer passes`."""

from __future__ import annotations

import click


@click.command(name="passes")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(as_json: bool) -> None:
    """List the graph passes, what each does, and its options.

    They are given to `compile --passes` in the order in which they are to run: name,name{option=value,option=value}.
    """
    import dataclasses

    from optimizer.cli.console import print_facts, print_table
    from optimizer.cli.plain_text import print_json
    from passes import pipeline

    known = [pipeline.describe(name) for name in pipeline.pass_names()]
    if as_json:
        print_json({"default": pipeline.DEFAULT, "passes": [dataclasses.asdict(each) for each in known]})
        return
    rows = [
        (each.name, each.documentation, "\n".join(f"{o.name}={o.default} ({o.type})" for o in each.options))
        for each in known
    ]
    print_table("passes", ("name", "what it does", "options with their defaults"), rows)
    print_facts("", [("default", pipeline.DEFAULT)])
