"""All methods by name."""

from tasks.methods.adapters import ADAPTERS
from tasks.methods.method import Method
from tasks.methods.reft import FORMULAS, ReftMethod
from tasks.methods.weights import HeadMethod, WeightsMethod, biases, everything, norms

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        ReftMethod(),
        ReftMethod(name="reft", title="ReFT, formula chosen", formulas=FORMULAS),
        *ADAPTERS,
        WeightsMethod("bias", "BitFit", biases, "bias terms"),
        WeightsMethod("norms", "norms", norms, "normalisations with weights"),
        HeadMethod(),
        WeightsMethod("full", "full finetuning", everything, "weights", learning_rates=(1e-6, 1e-2)),
    )
}
