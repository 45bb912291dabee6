"""The figures that the paper prints in Tables 4 to 9: scores in %, parameters in M."""

Scores = dict[str, float]

# Table 4, of the student: (inverted, supervised contrastive loss) -> corpus -> score.
ABLATION: dict[tuple[bool, bool], dict[str, Scores]] = {
    (False, False): {"iemocap": {"ua": 68.89}, "meld": {"wf1": 42.63}},
    (True, False): {"iemocap": {"ua": 69.69}, "meld": {"wf1": 45.92}},
    (True, True): {"iemocap": {"ua": 70.38}, "meld": {"wf1": 46.59}},
}

# Tables 5 and 6: corpus -> row of the results -> scores.
TABLES = {"iemocap": 5, "meld": 6}
ROWS: dict[str, dict[str, Scores]] = {
    "iemocap": {
        "teacher": {"wa": 73.40, "ua": 74.47},
        "student": {"wa": 69.41, "ua": 70.38},
        "meta_teacher": {"wa": 74.01, "ua": 75.21},
        "distilled_student": {"wa": 69.87, "ua": 70.74},
        "updated_student": {"wa": 70.25, "ua": 71.27},
    },
    "meld": {
        "teacher": {"wa": 51.77, "wf1": 47.06},
        "student": {"wa": 52.43, "wf1": 46.59},
        "meta_teacher": {"wa": 52.04, "wf1": 48.58},
        "distilled_student": {"wa": 51.93, "wf1": 46.80},
        "updated_student": {"wa": 52.28, "wf1": 46.96},
    },
}

# Table 7: model -> corpus -> parameters.
PARAMETERS: dict[str, dict[str, float]] = {
    "teacher": {"iemocap": 302.45, "meld": 301.83},
    "student": {"iemocap": 11.92, "meld": 11.87},
}

# Tables 8 and 9: corpus -> method -> parameters and scores.
BASELINE_TABLES = {"iemocap": 8, "meld": 9}
BASELINES: dict[str, dict[str, Scores]] = {
    "iemocap": {
        "CA-MSER": {"params": 166.53, "wa": 69.80, "ua": 71.05},
        "TIM-Net": {"params": 0.12, "wa": 68.20, "ua": 69.41},
        "DWFormer": {"params": 35.71, "wa": 69.63, "ua": 70.69},
        "ShiftCNN": {"params": 99.03, "wa": 70.40, "ua": 71.31},
        "SpeechFormer++": {"params": 63.76, "wa": 69.68, "ua": 71.09},
        "updated student": {"params": 11.92, "wa": 70.25, "ua": 71.27},
    },
    "meld": {
        "MM-DFN": {"params": 1.97, "wa": 47.70, "wf1": 45.80},
        "DWFormer": {"params": 25.70, "wa": 52.16, "wf1": 46.61},
        "SpeechFormer++": {"params": 63.76, "wa": 52.20, "wf1": 46.86},
        "updated student": {"params": 11.87, "wa": 52.28, "wf1": 46.96},
    },
}
