"""The transformer of ``token_network`` with weights that change, and the gradient with respect to them.

For factors a and directions c, the gradient of Σ_i a_i output_i + Σ_ij c_ij · ∂E/∂r_ij, with E = Σ seed · output, is
the rate of change of the gradient of E with respect to the weights, when edge vectors change along c and the seed along
a. The evaluation leaves behind values and gradients of E; here follow their rates of change, forward and backward, by
the kernels of ``token_rates_codegen``: about twice the work of the evaluation, and no second derivative by autograd.

Arrays are called as there; d_NAME is the rate of NAME, e_NAME that of g_NAME, and e that of the gradient on its way.
"""

import torch
from torch import Tensor

from equimd.kernels import attention_codegen, token_rates_codegen
from equimd.kernels.frozen import DTYPES, Evaluation, Geometry
from equimd.kernels.threads import torch_on_one_thread
from equimd.kernels.token_network import EXPONENTIAL, FusedTransformer, Sources, Step, token_arrays
from equimd.kernels.token_run import Run
from equimd.kernels.token_weights import Block, TokenNetwork
from equimd.kernels.topology import Topology
from equimd.kernels.workspace import Field

_MOST_SPARE = 2  # a loop that still names the last prediction needs two


class Record:
    """What an evaluation leaves behind; its arrays are used again when it is gone."""

    def __init__(self, owner: "TrainedTransformer", run: Run) -> None:
        self.run, self._owner = run, owner

    def __del__(self) -> None:
        self._owner.take_back(self.run)


class TrainedTransformer(FusedTransformer):
    """``network`` with a gradient; ``update`` gives it the weights of the next step."""

    keeps = True

    def record(
        self, geometry: Geometry, kind: Tensor, seed: Tensor, topology: Topology, reverse: Tensor
    ) -> tuple[Evaluation, Record]:
        """As ``FusedTransformer``; and what ``gradient`` is to find again."""
        results, run = self.evaluate(geometry, kind, seed, topology, reverse)
        return results, Record(self, run)

    def take_back(self, run: Run) -> None:
        """Use the arrays of a run again, unless those of two others wait for that already."""
        if len(self._spare) < _MOST_SPARE:
            self._spare.append(run.workspace)

    def gradient(self, network: TokenNetwork, record: Record, factors: Tensor, directions: Tensor) -> TokenNetwork:
        """With respect to each weight of ``network``, in its place; factors (N,), directions (E, 3).

        The record stays as it is. The weights must be those of the evaluation.
        """
        run, real = record.run, DTYPES[self.dtype]
        with torch.inference_mode(False), torch.no_grad(), torch_on_one_thread() as run.n_threads:
            found = self._filling.make_room(network, real, for_gradient=True)
            run.hold({"d_seed": factors.to(real).contiguous(), "directions": directions.to(torch.float64).contiguous()})
            run.hold({"to_atoms": found.of_atoms, "to_pairs": found.of_pairs})
            self._rates(run)
            self._rates_back(run, found)
            for stage in found.stages:
                stage.constant.fill_(factors.sum())
            return self._filling.read(network, found)

    def _rates(self, run: Run) -> None:
        run.kernel("tokens_rates", "rates: tokens", d_x="d_x0")
        for k, stage, steps in self.steps():
            for step in steps:
                _block_rates(run, step)
            if stage.message is not None:
                title = f"rates: message {k}"
                run.kernel("norm_rates", title, x=f"end{k}", d_x=f"d_end{k}")
                run.linear("d_y", stage.message.T, "sent", title)
                run.kernel("receive", title, x=f"d_end{k}", x_next=f"d_x{steps[-1].i + 1}")

    def _rates_back(self, run: Run, found: TokenNetwork) -> None:
        for k, stage, steps in reversed(self.steps()):
            own, title = found.stages[k], f"rates back: readout {k}"
            if stage.message is None:
                run.clear("e")
                run.kernel("readout_rates_last", title, heads=f"heads{k}")
            else:
                run.kernel("receive_back", title, g=f"g_x{steps[-1].i + 1}", g_sent="sent")
                run.kernel("receive_back", title, g="e", g_sent="e_sent")
                run.linear("e_sent", stage.message, "e_message", title)
                run.kernel("readout_rates", title, heads=f"heads{k}", g_message=f"g_yend{k}")
            run.kernel("norm_rates_back", title, x=f"end{k}", d_x=f"d_end{k}", g_y="g_y")
            run.products(own.heads, title, ("d_factors", "y"), ("factors", "d_y"))
            if own.message is not None:
                run.products(own.message, title, ("e_sent", "y"), ("sent", "d_y"))
            for step in reversed(steps):
                _block_rates_back(run, step, own.blocks[step.i - steps[0].i])
        title = "rates back: tokens"
        run.products(found.embedding, title, ("features", "e"), ("d_features", "g_x0"))
        run.kernel("species_back", title)

    def _arrays(self, network: TokenNetwork) -> tuple[dict[str, Field], dict[str, str]]:
        fields, shared = super()._arrays(network)
        real, (n_features, d) = DTYPES[self.dtype], network.embedding.shape
        values = token_arrays(self._room.stages, d, self.n_heads)
        block = self._room.stages[0].blocks[0]
        width, heads = block.down.shape[1], block.out.shape[1]
        tokens = {f"d_{name}": n for name, n in values["token"].items() if not name.startswith(("g_", "sent"))}
        tokens |= {name: d for name in ("e", "e_y", "e_sent", "e_message", "g_y")}
        tokens |= {"e_o": heads, "e_qkv": 3 * heads, "e_h": width, "e_up": 2 * width}
        tokens |= {"features": n_features, "d_features": n_features, "factors": 2, "d_factors": 2}
        atoms = {f"d_{name}": n for name, n in values["atom"].items() if not name.startswith("g_")}
        if block.atom_down is not None:
            wide = block.atom_down.shape[1]
            atoms |= {"g_atom_y": d, "e_atom_y": d, "e_atom_h": wide, "e_atom_up": 2 * wide}
        fields |= {name: Field("token", n, real) for name, n in tokens.items()}
        return fields | {name: Field("atom", n, real) for name, n in atoms.items()}, shared

    def _sources(self, network: TokenNetwork) -> Sources:
        block, dtype = self._room.stages[0].blocks[0], self.dtype
        (n_features, d), n_species, width = network.embedding.shape, network.of_atoms.shape[0], block.down.shape[1]
        heads, rates = (self.n_heads, block.out.shape[1] // self.n_heads, dtype), token_rates_codegen
        sources: Sources = {
            "tokens_rates": (rates.tokens_rates_source(d, n_features - 4, dtype), "atom", n_features * d + 200),
            "norm_rates": (rates.norm_rates_source(d, dtype), "token", 4 * d),
            "attention_rates": (attention_codegen.attention_rates_source(*heads), "atom", 250 * d),
            "swiglu_rates": (rates.swiglu_rates_source(width, dtype), "token", EXPONENTIAL * width),
            "readout_rates_last": (rates.readout_rates_source(d, dtype, True), "atom", 4 * d),
            "swiglu_rates_back": (rates.swiglu_rates_back_source(width, dtype), "token", EXPONENTIAL * width),
            "attention_rates_back": (attention_codegen.attention_rates_back_source(*heads), "atom", 500 * d),
            "norm_rates_back": (rates.norm_rates_back_source(d, dtype), "token", 8 * d),
            "species_back": (rates.species_back_source(d, n_species, dtype), "atom", 0),
        }
        if len(network.stages) > 1:
            sources["readout_rates"] = (rates.readout_rates_source(d, dtype, False), "atom", 4 * d)
        if block.atom_down is not None:
            width = block.atom_down.shape[1]
            sources |= {
                "atom_swiglu_rates": (rates.swiglu_rates_source(width, dtype), "atom", 0),
                "atom_swiglu_rates_back": (rates.swiglu_rates_back_source(width, dtype), "atom", 0),
            }
        return super()._sources(network) | sources


def _block_rates(run: Run, step: Step) -> None:
    (i, block, after), title = step, f"rates: block {step.i}: "
    run.kernel("norm_rates", title + "norm", x=f"x{i}", d_x=f"d_x{i}")
    run.linear("d_y", block.qkv.T, f"d_qkv{i}", title + "linear")
    run.kernel("attention_rates", title + "attention", d_out=f"d_o{i}", **_attention_names(i))
    run.linear(f"d_o{i}", block.out.T, f"d_mid{i}", title + "linear", add=f"d_x{i}")
    run.kernel("norm_rates", title + "norm", x=f"mid{i}", d_x=f"d_mid{i}")
    run.linear("d_y", block.up.T, f"d_up{i}", title + "linear")
    run.kernel("swiglu_rates", title + "swiglu", up=f"up{i}", d_up=f"d_up{i}")
    run.linear("d_h", block.down.T, f"d_{after}", title + "linear", add=f"d_mid{i}")
    if block.atom_up is not None and block.atom_down is not None:
        run.take_atoms("d_y", "d_atom_y", title + "atoms")
        run.linear("d_atom_y", block.atom_up.T, f"d_atom_up{i}", title + "atoms")
        names = {"up": f"atom_up{i}", "d_up": f"d_atom_up{i}", "d_h": "d_atom_h"}
        run.kernel("atom_swiglu_rates", title + "atoms", **names)
        run.linear("d_atom_h", block.atom_down.T, "d_atom_y", title + "atoms")
        run.add_to_atoms("d_atom_y", f"d_{after}", title + "atoms")


def _block_rates_back(run: Run, step: Step, found: Block) -> None:
    """e, the rate of the gradient of what came out, becomes that of what went in; ``found`` gets its gradients."""
    (i, block, after), title = step, f"rates back: block {step.i}: "
    run.linear("e", block.down, "e_h", title + "linear")
    run.kernel("swiglu_rates_back", title + "swiglu", up=f"up{i}", d_up=f"d_up{i}", g_h=f"g_h{i}", g_up="g_up")
    run.products(found.down, title + "weights", ("e", "h"), (f"g_{after}", "d_h"))
    run.linear("e_up", block.up, "e_y", title + "linear")
    _atoms_rates_back(run, step, found)
    run.kernel("norm_rates_back", title + "norm", x=f"mid{i}", d_x=f"d_mid{i}", g_y=f"g_ymid{i}")
    run.products(found.up, title + "weights", ("e_up", "y"), ("g_up", "d_y"))
    if found.atom_up is not None:
        run.take_atoms("y", "atom_y", title + "atoms")
        run.take_atoms("d_y", "d_atom_y", title + "atoms")
        run.products(found.atom_up, title + "atoms", ("e_atom_up", "atom_y"), ("g_atom_up", "d_atom_y"))
    run.products(found.out, title + "weights", ("e", f"o{i}"), (f"g_mid{i}", f"d_o{i}"))
    run.linear("e", block.out, "e_o", title + "linear")
    run.kernel("attention_rates_back", title + "attention", g=f"g_o{i}", e="e_o", **_attention_names(i))
    run.linear("e_qkv", block.qkv, "e_y", title + "linear")
    run.kernel("norm_rates_back", title + "norm", x=f"x{i}", d_x=f"d_x{i}", g_y=f"g_yx{i}")
    run.products(found.qkv, title + "weights", ("e_qkv", "y"), (f"g_qkv{i}", "d_y"))


def _atoms_rates_back(run: Run, step: Step, found: Block) -> None:
    """The same of the SwiGLU of atoms' tokens: their share of e_y, and the gradient of the second map."""
    (i, block, after), title = step, f"rates back: block {step.i}: atoms"
    if block.atom_up is None or block.atom_down is None or found.atom_down is None:
        return
    run.take_atoms("e", "e_atom_y", title)
    run.take_atoms(f"g_{after}", "g_atom_y", title)
    run.linear("e_atom_y", block.atom_down, "e_atom_h", title)
    names = {"up": f"atom_up{i}", "d_up": f"d_atom_up{i}", "g_h": f"g_atom_h{i}", "e_h": "e_atom_h"}
    run.kernel("atom_swiglu_rates_back", title, e_up="e_atom_up", g_up="g_atom_up", h="atom_h", d_h="d_atom_h", **names)
    run.products(found.atom_down, title, ("e_atom_y", "atom_h"), ("g_atom_y", "d_atom_h"))
    run.linear("e_atom_up", block.atom_up, "e_atom_y", title)
    run.add_to_atoms("e_atom_y", "e_y", title)


def _attention_names(i: int) -> dict[str, str]:
    return {name: f"{name}{i}" for name in ("qkv", "d_qkv", "level", "d_level")}
