"""``equimd info``: versions, devices, potentials."""

from equimd.cli.common import Json, check_json, emit, grid


def info(json: Json = None) -> None:
    """Show versions, devices and the potentials that are ready to run."""
    check_json(json)
    from equimd.report.inventory import inventory

    result = inventory()

    def show():  # noqa: ANN202
        from rich.console import Group

        p = result.provenance
        about = [("python", p.python, ""), *((name, version, "") for name, version in p.versions.items())]
        about += [("processor", p.processor, f"{p.n_threads} threads"), ("devices", ", ".join(result.devices), "")]
        known = [(q.name, *_card(q.card)) for q in result.potentials]
        return Group(grid("equimd", about), grid("Potentials", known or [("none installed", "", "")]))

    emit(result, json, show)


def _card(card: dict | None) -> tuple[str, str]:
    if not card:
        return "", "no card"
    test = card.get("test") or {}
    force = test.get("force_mae")
    error = "" if force is None else f"{1e3 * force:.1f} meV/Å"
    return error, f"{card.get('reference', '')}, {' '.join(map(str, card.get('elements', [])))}"
