"""Routes beyond the SDK's, for the project's own clients: texts and tokens, hidden states, and merged weights."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from rlt.errors import Refused
from rlt.serving.api.asking import Body, Serving, Tenant
from rlt.serving.api.texts import Texts, read_texts
from rlt.serving.api.training import model_asked, named, submit_training
from rlt.serving.kinds import dump
from rlt.serving.service import Service
from rlt.wire.checks import array_of_list, check_count, checked_tokens
from rlt.wire.form import flag, sequence, text

router = APIRouter()


async def texts_of(service: Service, body: dict[str, Any]) -> Texts:
    base_model = text(body, "base_model")
    service.check_base_model(base_model)
    folder = service.settings.base_models[base_model].tokenizer
    if folder is None:
        raise Refused(f"the server knows no tokenizer of {base_model}: load it where the client is")
    return await asyncio.to_thread(read_texts, folder)


@router.post("/tokenize")
async def tokenize(service: Serving, tenant: Tenant, body: Body) -> dict[str, Any]:
    known, texts = await texts_of(service, body), sequence(body.get("texts"), "texts")
    if not all(isinstance(each, str) for each in texts):
        raise Refused("texts holds something else than texts")
    return {"tokens": await asyncio.to_thread(known.tokens, texts, flag(body, "add_special_tokens", False))}


@router.post("/detokenize")
async def detokenize(service: Serving, tenant: Tenant, body: Body) -> dict[str, Any]:
    known = await texts_of(service, body)
    tokens = [array_of_list(each, "int64", "tokens") for each in sequence(body.get("tokens"), "tokens")]
    for each in tokens:
        if each.size and not 0 <= each.min() <= each.max() < 2**31:
            raise Refused("tokens holds numbers that are no tokens")
    lists = [each.tolist() for each in tokens]
    return {"texts": await asyncio.to_thread(known.texts, lists, flag(body, "skip_special_tokens", True))}


@router.post("/apply_chat_template")
async def apply_chat_template(service: Serving, tenant: Tenant, body: Body) -> dict[str, Any]:
    known, messages = await texts_of(service, body), sequence(body.get("messages"), "messages")
    rendered = await asyncio.to_thread(known.chat, messages, flag(body, "add_generation_prompt", True))
    return {"text": rendered, "tokens": (await asyncio.to_thread(known.tokens, [rendered], False))[0]}


@router.post("/embeddings")
async def embeddings(request: Request, service: Serving, tenant: Tenant, body: Body) -> dict[str, str]:
    """Numbered as training is: of the weights that all earlier requests of the model leave."""
    model, seq_id = await model_asked(service, tenant, body)
    limits = service.settings.limits

    def work() -> tuple[bytes, dict[str, Any]]:
        given = sequence(body.get("sequences"), "sequences")
        check_count(len(given), limits)
        read = [checked_tokens(array_of_list(each, "int64", "sequences"), limits).tolist() for each in given]
        return dump({"sequences": read}), {}

    return await submit_training(service, model, "embed", seq_id, work)


@router.post("/save_weights_merged")
async def save_weights_merged(service: Serving, tenant: Tenant, body: Body) -> dict[str, str]:
    """As `save_weights_external`, and the files are those of a whole model."""
    model, seq_id = await model_asked(service, tenant, body)

    def work() -> tuple[bytes, dict[str, Any]]:
        return named(service, body, "external_weights", body.get("path"))

    return await submit_training(service, model, "save_weights_merged", seq_id, work)
