"""The gate that both skins ask: who is this, may they do that, and is there anything left of their allowance?"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from adaplex_adapters.errors import AuthenticationFailed, ModelNotFound, PermissionDenied
from adaplex_server.caller import ANYONE, Caller, Limits
from adaplex_server.service.access.key_store import KeyStore
from adaplex_server.service.access.keys import split_key
from adaplex_server.service.access.policy import POLICY
from adaplex_server.service.access.rates import Lease, Rates

log = logging.getLogger(__name__)


class Gate:
    """Owns the rates; reads the keys. keys: None for a server that never asks for one. adapter_limits: of every
    adapter, over all keys.
    """

    def __init__(self, keys: KeyStore | None, adapter_limits: Limits) -> None:
        self._keys = keys
        self._adapter_limits = adapter_limits
        self._rates = Rates()

    @property
    def open(self) -> bool:
        """Whether the server has no keys, and so nobody has secrets from anybody."""
        return self._keys is None or not self._keys.records()

    def caller(self, authorization: str | None) -> Caller:
        """Whose key this `Authorization` value holds; ANYONE while the server has no keys. Raises
        AuthenticationFailed.
        """
        records = self._keys.records() if self._keys is not None else {}
        if not records:
            return ANYONE
        if not authorization:
            raise AuthenticationFailed("this server needs an API key: send it as 'Authorization: Bearer adx_...'")
        scheme, _, key = authorization.partition(" ")
        parts = split_key(key.strip()) if scheme.lower() == "bearer" else None
        if parts and parts[0] not in records and self._keys is not None:
            records = self._keys.records(fresh=True)  # it may be a moment old
        record = records.get(parts[0]) if parts else None
        if parts is None or record is None or not record.fits(parts[1]):
            raise AuthenticationFailed("the API key is not one of this server's; `adaplex keys create` makes one")
        if not record.usable(time.time()):
            raise AuthenticationFailed(f"the API key {parts[0]} has {'been revoked' if record.revoked else 'expired'}")
        return record.caller

    def allow(self, route: str, authorization: str | None) -> Caller:
        """The caller, if the policy lets them use this route. Raises AuthenticationFailed, PermissionDenied."""
        need = POLICY.get(route)
        if need == "nothing":
            return ANYONE
        caller = self.caller(authorization)
        if need is None or not caller.may(need):
            raise PermissionDenied(
                f"the API key {caller.key} may not '{need}'; it may {', '.join(sorted(caller.verbs))}"
            )
        return caller

    def admit(self, caller: Caller, adapters: Sequence[str], prompt_tokens: int) -> Lease:
        """Begin a request that uses these adapters. Raises RateLimited."""
        wanted = {self._subject(caller): caller.limits}
        for adapter in adapters:
            wanted[f"the adapter '{adapter}'"] = self._adapter_limits
        return self._rates.admit(wanted, prompt_tokens)

    def headers(self, caller: Caller) -> Mapping[str, str]:
        """What is left of the caller's allowance."""
        return self._rates.headers(self._subject(caller), caller.limits)

    @staticmethod
    def check_name(caller: Caller, model: str) -> None:
        """Raises ModelNotFound for a name outside the key's scope, in the words that hide whether it exists."""
        if not caller.may_name(model):
            raise ModelNotFound(
                f"The model {model[:96]!a} does not exist, or the API key {caller.key} has no access to it.",
                param="model",
            )

    @staticmethod
    def _subject(caller: Caller) -> str:
        return f"the API key {caller.key}"
