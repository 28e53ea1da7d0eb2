"""Graft inside Stable Diffusion WebUI Forge; `scripts/graft_forge.py` is what Forge itself loads.

    app.py       the extension: Forge's callbacks, its settings, its jobs; with host.py all that imports Forge
    host.py      what Graft touches of Forge's backend, found by feature
    layout.py    the two layouts in which Forge holds packed bytes
    patches.py   LoRAs on Forge's patchers, and their patches as adapters
    loras.py     LoRA files on their way to Forge's loader, and what became of them
    strengths.py where and when a LoRA of the prompt works
    reading.py   GGUF files that Forge's own reader does not read, or not rightly
    engine.py    the hooks, and the forward pass of a GGUF layer
    session.py   settings, the loaded model and the prompt's LoRAs, as rows for the tab
    verify.py    one layer of each type, beside the model and merged into it
    inspection.py  what is in a GGUF or LoRA file
    pictures.py  tables and bar charts as HTML
    tab.py       the tab
"""
