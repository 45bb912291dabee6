"""Speech emotion corpora, by name.

To add a corpus, subclass `SpeechCorpus` in a file of its own, list its utterances in
`list_utterances`, and name the class here. A corpus that a manifest can list needs no code, see
`Manifest`.
"""

import inspect

from ml_collections import ConfigDict

from serkd_jax.data.corpora.base import CorpusError, SpeechCorpus
from serkd_jax.data.corpora.emodb import EmoDB
from serkd_jax.data.corpora.iemocap import IEMOCAP
from serkd_jax.data.corpora.manifest import Manifest
from serkd_jax.data.corpora.meld import MELD
from serkd_jax.data.corpora.synthetic import Synthetic

CORPORA: dict[str, type[SpeechCorpus]] = {
    corpus.name: corpus for corpus in (IEMOCAP, MELD, EmoDB, Manifest, Synthetic)
}


def make_corpus(name: str, **settings) -> SpeechCorpus:
    """Makes a corpus by name; an empty setting ('') means the corpus's own default.

    Raises:
        CorpusError: there is no such corpus, or it has no such setting.
    """
    if name not in CORPORA:
        raise CorpusError(f"no corpus is named {name!r}; there are {', '.join(CORPORA)}")
    given = {key: value for key, value in settings.items() if value != ""}
    known = inspect.signature(CORPORA[name]).parameters
    if unknown := given.keys() - known.keys():
        raise CorpusError(
            f"corpus {name!r} has no setting {', '.join(sorted(unknown))}; "
            f"it has {', '.join(known)}"
        )
    return CORPORA[name](**given)


def corpus_of(config: ConfigDict) -> SpeechCorpus:
    """Makes the corpus that a recipe names, with the settings that the recipe gives."""
    keys = ("data_dir", "manifest", "label_map", "speaker_pattern")
    given = {key: config[key] for key in keys if config.get(key)}
    return make_corpus(config.corpus, **given, **config.get("synthetic", {}))
