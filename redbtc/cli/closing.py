"""The command account terminate."""

from __future__ import annotations

import sys
from typing import Any

import click

from redbtc.cli.accounts import account, path_of_account
from redbtc.cli.main import CommandContext, json_option, plain, show


def warning(found: dict[str, Any], now: bool) -> str:
    """Return what terminating an account will do."""
    name, account_id = plain(found["account"]), found["account_id"]
    when = "at once" if now else f"at {found['erase_at']}"
    return (
        f"Account {name} ({account_id}) will be terminated. This can't be undone.\n"
        f"  Its {found['keys']} keys are revoked, its requests in flight are cut, and its logins "
        "are closed, at once.\n"
        f"  Its name, addresses, labels, notes, stored object ids and log entries' texts are "
        f"erased {when}.\n"
        f"  To keep a copy of its data, run redbtc-proxy account export {account_id} before."
    )


def terminated_text(done: dict[str, Any]) -> str:
    """Return what `account terminate` has done."""
    lines = [
        f"Account {done['account_id']} terminated. Keys revoked: {done['keys']}. Requests in "
        f"flight cut: {done['cut']}."
    ]
    if done["erased_at"]:
        lines.append(f"What identified it was erased at {done['erased_at']}.")
    elif done["missing"]:
        lines.append(
            f"It is not completely erased yet: {done['missing']}. The gateway tries again by "
            f"itself; account terminate {done['account_id']} --now --yes does it now."
        )
    else:
        lines.append(f"What identifies it will be erased at {done['erase_at']}.")
    if done["erased_at"] and done["copies"]:
        lines += ["These files may still have its data:", *(f"  {each}" for each in done["copies"])]
    return "\n".join(lines)


class ProgressShown:
    """Shows the progress of an erasure on standard error, a line for each step, and keeps the
    result."""

    def __init__(self) -> None:
        self.result: dict[str, Any] = {}
        self._step = ""

    def on_line(self, line: dict[str, Any]) -> None:
        """Show a line of the answer, or keep it if it is the result."""
        if "step" not in line:
            self.result = line
            self._end_step()
            return
        if line["step"] != self._step:
            self._end_step()
            self._step = line["step"]
        again = "\r" if sys.stderr.isatty() else ""
        if again or not line["rows"]:
            rows = f": {line['rows']}" if line["rows"] else ""
            click.echo(f"{again}Erasing {self._step}{rows}", nl=not again, err=True)

    def _end_step(self) -> None:
        if self._step and sys.stderr.isatty():
            click.echo(err=True)
        self._step = ""


@account.command("terminate")
@click.argument("name")
@click.option("--now", is_flag=True, help="Erase what identifies the account at once.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@json_option
@click.pass_obj
def account_terminate(
    context: CommandContext, name: str, now: bool, yes: bool, as_json: bool
) -> None:
    """Terminate an account: revoke its keys, cut its requests in flight and close its logins.

    What identifies the account is erased later, or at once with --now. What accounting needs is
    kept. If the erasure is interrupted, the same command continues it. This can't be undone."""
    path, body = path_of_account(name, "/terminate"), {"now": now}
    if not yes:
        found = context.call("POST", path, {**body, "preview": True})
        click.echo(warning(found, now), err=True)
        click.confirm("Terminate this account?", abort=True, err=True)
    shown = ProgressShown()
    context.follow(path, body, shown.on_line)
    show(shown.result, as_json, lambda: terminated_text(shown.result))
    if shown.result["missing"]:
        raise SystemExit(1)
