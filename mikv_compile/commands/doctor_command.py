"""``mikv doctor``: is everything here that the backend needs?"""

import typer

from mikv_compile.commands import common
from mikv_compile.commands.common import AsJson


def command(as_json: AsJson = False) -> None:
    """Check versions, compiler, kernels, devices and a tiny model; exit status 1 if something needed is broken."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    with Console(stderr=True, quiet=as_json).status("importing torch") as status:
        from mikv_compile import doctor

        found = doctor.examine(lambda name: status.update(f"looking at: {name}"))
    broken = [finding for finding in found if finding.status == doctor.BROKEN]
    if as_json:
        common.print_json({"ok": not broken, "findings": [vars(finding) for finding in found]})
    else:
        table = Table("", "what", "found", box=None)
        colours = {doctor.OK: "green", doctor.NOTE: "yellow", doctor.BROKEN: "red"}
        for finding in found:
            advice = f"\n-> {finding.advice}" if finding.advice else ""
            colour = colours[finding.status]
            table.add_row(f"[{colour}]{finding.status}[/]", escape(finding.name), escape(finding.said + advice))
        console = common.console()
        console.print(table)
        console.print(f"{len(broken)} broken" if broken else "everything that is needed works")
    raise typer.Exit(int(bool(broken)))
