"""The protobuf messages of the training API, made when the process starts from the table of their fields.

Each field is `NUMBER NAME TYPE`; `TYPE*` repeats, `TYPE?` tells absent from zero, `map TYPE` has strings as keys, and
fields marked `|GROUP` exclude each other. The classes live in a pool of their own, so that a process may also import a
client library that has messages of these names.
"""

import re
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "tinker_public"
ENUMS = {
    "StopReason": {"STOP": 0, "LENGTH": 1},
    "DType": {"DTYPE_UNSPECIFIED": 0, "FLOAT32": 1, "INT64": 2, "INT32": 3, "BFLOAT16": 4},
}
MESSAGES = {
    "ForwardBackwardRequest": (
        *("1 model_id string", "2 seq_id int32", "3 data Datum*", "4 loss_fn string"),
        *("5 loss_fn_config map double", "6 forward_only bool", "7 loss_fn_config_v2 map LossConfigValue"),
    ),
    "LossConfigValue": ("1 number double |value", "2 text string |value"),
    "Datum": (
        *("1 model_input Chunk*", "2 loss_fn_inputs map Tensor"),
        *("3 model_input_spans ProvenanceSpan*", "4 loss_fn_input_spans ProvenanceSpan*"),
    ),
    "ProvenanceSpan": ("1 prompt_tokens PromptProvenanceSpan |span", "2 sampled_tokens SampledProvenanceSpan |span"),
    "PromptProvenanceSpan": ("1 sequence_id string", "2 offset int64", "3 length int64"),
    "SampledProvenanceSpan": ("1 sequence_id string", "2 offset int64", "3 length int64"),
    "Chunk": ("1 encoded_text EncodedTextChunk |chunk", "2 image ImageChunk |chunk", "3 dmel DmelChunk |chunk"),
    "EncodedTextChunk": ("1 tokens bytes",),
    "ImageChunk": (
        *("1 data bytes", "2 format string", "3 expected_tokens int32?", "4 override_dimensions ImageDimensions"),
    ),
    "ImageDimensions": ("1 width uint32", "2 height uint32"),
    "DmelChunk": ("1 dmel bytes",),
    "Tensor": ("1 dense bytes |encoding", "2 sparse_csr SparseCsr |encoding", "3 dtype DType", "4 shape int64*"),
    "SparseCsr": ("1 values bytes", "2 crow_indices bytes", "3 col_indices bytes"),
    "ForwardBackwardOutput": (
        *("1 loss_fn_output_type string", "2 loss_fn_outputs ArrayRecord*", "3 metrics map double"),
    ),
    "ArrayRecord": ("1 type_tag string", "2 fields map BatchedTensor", "3 num_datums int64"),
    "BatchedTensor": ("1 data bytes", "2 offsets bytes", "3 dtype DType", "4 trailing_shape int64*"),
    "SampleResponse": (
        *("1 sequences SampledSequence*", "2 prompt_logprobs bytes?", "3 topk_prompt_logprobs TopkLogprobs"),
        *("4 prompt_cache_hit_tokens int32", "5 target_prompt_logprobs Tensor", "6 prompt_alt_tokens PromptAltTokens"),
    ),
    "SampledSequence": (
        *("1 stop_reason StopReason", "2 tokens bytes", "3 logprobs bytes?", "4 topk_sampled_logprobs TopkLogprobs"),
    ),
    "TopkLogprobs": ("1 token_ids bytes", "2 logprobs bytes", "3 k uint32", "4 length uint32"),
    "PromptAltTokens": ("1 tokens Tensor", "2 logprobs Tensor"),
}
FIELD = re.compile(r"(?P<number>\d+) (?P<name>\w+) (?P<map>map )?(?P<type>\w+)(?P<mark>[*?])?(?: \|(?P<group>\w+))?")
Proto = descriptor_pb2.FieldDescriptorProto
SCALARS = {
    name: getattr(Proto, f"TYPE_{name.upper()}")
    for name in ("string", "bytes", "bool", "double", "int32", "int64", "uint32")
}


def _set_type(field: Proto, type_name: str) -> None:
    if type_name in SCALARS:
        field.type = SCALARS[type_name]
        return
    field.type = Proto.TYPE_ENUM if type_name in ENUMS else Proto.TYPE_MESSAGE
    field.type_name = f".{PACKAGE}.{type_name}"


def _add_field(message: descriptor_pb2.DescriptorProto, line: str) -> None:
    match = FIELD.fullmatch(line)
    assert match, line
    field = message.field.add(name=match["name"], number=int(match["number"]), label=Proto.LABEL_OPTIONAL)
    if match["map"]:
        entry = message.nested_type.add(name=f"{match['name'].title().replace('_', '')}Entry")
        entry.options.map_entry = True
        key = entry.field.add(name="key", number=1, label=Proto.LABEL_OPTIONAL)
        _set_type(key, "string")
        _set_type(entry.field.add(name="value", number=2, label=Proto.LABEL_OPTIONAL), match["type"])
        field.label, field.type = Proto.LABEL_REPEATED, Proto.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{message.name}.{entry.name}"
        return
    _set_type(field, match["type"])
    if match["mark"] == "*":
        field.label = Proto.LABEL_REPEATED
    if group := match["group"]:
        if not any(choice.name == group for choice in message.oneof_decl):
            message.oneof_decl.add(name=group)
        field.oneof_index = len(message.oneof_decl) - 1
    if match["mark"] == "?":  # proto3 keeps presence in a choice of one
        message.oneof_decl.add(name=f"_{match['name']}")
        field.oneof_index, field.proto3_optional = len(message.oneof_decl) - 1, True


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="rlt_training_api.proto", package=PACKAGE, syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for label, number in values.items():
            enum.value.add(name=label, number=number)
    for name, lines in MESSAGES.items():
        message = file.message_type.add(name=name)
        for line in lines:
            _add_field(message, line)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


@cache
def message_class(name: str) -> Any:
    """The class of a message of the table; its fields are only known once it is made."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{PACKAGE}.{name}"))
