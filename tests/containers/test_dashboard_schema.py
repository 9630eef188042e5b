"""The dashboard against Grafana's own types: its JSON becomes TypeScript constants of the types that Grafana publishes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.packaging.files import DOCKER

PACKAGES = ("typescript@5.9.3", "@grafana/grafana-foundation-sdk@0.0.21")
COMPILE = ("npx", "tsc", "--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022")
# Enumerations are plain strings in JSON, and a panel may leave out what has a default.
HEAD = """
import * as D from "@grafana/grafana-foundation-sdk/dashboard";
import * as P from "@grafana/grafana-foundation-sdk/prometheus";
import * as T from "@grafana/grafana-foundation-sdk/timeseries";
import * as S from "@grafana/grafana-foundation-sdk/stat";
type Json<V> = V extends boolean ? V : V extends string ? `${V}` : V extends number ? number
  : V extends (infer E)[] ? Json<E>[] : V extends object ? {[K in keyof V]: Json<V[K]>} : V;
type Query = Json<Omit<P.Dataquery, "_implementsDataqueryVariant">>;
type Fields<C> = Omit<Json<D.FieldConfigSource>, "defaults"> & {
  defaults: Omit<Json<D.FieldConfig>, "custom"> & {custom?: Partial<Json<C>>}};
type Panel<O, C> = Omit<Json<D.Panel>, "targets" | "options" | "fieldConfig"> & {
  targets: Query[], options: Json<O>, fieldConfig: Fields<C>};
"""
PANELS = {"row": "Json<D.RowPanel>", "stat": "Panel<S.Options, {}>", "timeseries": "Panel<Partial<T.Options>, T.FieldConfig>"}
Compiler = Callable[[dict[str, Any]], str]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """What Grafana's types have against a dashboard; "" for nothing."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm: apt-get install npm")
    home = tmp_path_factory.mktemp("types")
    (home / "package.json").write_text('{"type": "module"}')
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", *PACKAGES], cwd=home, check=True)

    def compile_(dashboard: dict[str, Any]) -> str:
        rest = {key: value for key, value in dashboard.items() if key != "panels"}
        lines = [HEAD, f"export const dashboard: Omit<Json<D.Dashboard>, 'panels'> = {json.dumps(rest)};"]
        lines += [f"export const panel{p['id']}: {PANELS[p['type']]} = {json.dumps(p)};" for p in dashboard["panels"]]
        (home / "check.ts").write_text("\n".join(lines))
        done = subprocess.run([*COMPILE, "check.ts"], cwd=home, capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else done.stdout + done.stderr

    return compile_


def shipped() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCKER / "grafana/dashboards/peerkv.json").read_text())
    return found


def test_grafanas_types_accept_the_dashboard(compiler: Compiler) -> None:
    assert compiler(shipped()) == ""


def test_a_key_or_a_word_that_grafana_does_not_know_is_found(compiler: Compiler) -> None:
    changed = shipped()
    graph = next(panel for panel in changed["panels"] if panel["type"] == "timeseries")
    graph["fieldConfig"]["defaults"]["custom"]["lineWith"] = 1
    assert "lineWith" in compiler(changed)
    graph["fieldConfig"]["defaults"]["custom"] = {}
    graph["fieldConfig"]["defaults"]["color"]["mode"] = "palette-clasic"
    assert "palette-clasic" in compiler(changed)
