"""What leads back to a trained parameter keeps its graph; everything else may be cut."""

import torch
from torch import nn

from intaglio.training.resting import _leads_to_parameter


def test_only_a_graph_with_a_parameter_leads_to_one():
    leaf, parameter = torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(2))
    assert _leads_to_parameter(parameter)
    assert _leads_to_parameter((leaf * 2 + parameter).exp())
    assert not _leads_to_parameter(leaf)
    assert not _leads_to_parameter((leaf * 2).exp())
