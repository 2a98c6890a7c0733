"""The few lines every kernel file shares. Knows torch; knows nothing of CoMemo."""


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`; `message` names function, wanted and got."""
    if not condition:
        raise ValueError(message)
