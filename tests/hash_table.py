"""For each field of a run file, the hashes that change with it. Tests compare the declarations with this table."""

MOVES = {
    "baseline ingest phases run store": """
        data.background data.exif_orientation
    """,
    "baseline phases plan run": """
        distill.budget
    """,
    "baseline phases run": """
        distill.phases
    """,
    "baseline phases run store": """
        data.train_limit data.eval_limit data.image_size data.normalise data.captions.lowercase
        data.captions.strip_punctuation data.captions.max_words model.image.name model.image.weights
        model.image.trainable model.image.widths model.image.groups model.image.projection model.text.name
        model.text.pooling model.text.max_tokens model.text.normalise model.text.width model.text.projection
        model.width model.dropout model.temperature experts.epochs experts.batch experts.lr_image experts.lr_text
        experts.momentum experts.weight_decay experts.augment.crop experts.augment.crop_scale
        experts.augment.crop_ratio experts.augment.flip experts.augment.randaugment_ops
        experts.augment.randaugment_magnitude experts.augment.randaugment_probability experts.shuffle.kind
        experts.worker_group.workers experts.keep experts.dtype experts.forgetting experts.seed
    """,
    "baseline phases store": """
        runtime.gpus_per_worker
    """,
    "baseline run": """
        evaluate.epochs evaluate.batch evaluate.momentum evaluate.weight_decay evaluate.lr_drop evaluate.augment
        evaluate.selection_students evaluate.baseline_lrs evaluate.baseline_losses evaluate.baseline_draws
        evaluate.seed
    """,
    "ingest run": """
        data.layout data.annotations data.scenes.train data.scenes.val data.scenes.test data.scenes.size
        data.scenes.seed data.reencode data.shard_mb data.max_pixels data.splits.from_source data.splits.names
        data.splits.val data.splits.test data.duplicates
    """,
    "nothing": """
        data.root data.max_loss data.imagefolder.files data.imagefolder.image data.imagefolder.caption
        data.imagefolder.split data.huggingface.folder data.huggingface.hub data.huggingface.config
        data.huggingface.revision data.huggingface.image data.huggingface.caption data.huggingface.split
        experts.shuffle.block experts.shuffle.window experts.worker_group.strategy distill.budget_check
        distill.path_start distill.path_lag distill.path_epochs distill.path_order distill.plan.chain
        distill.guard.retries distill.checkpoint_every evaluate.between
        evaluate.probes search.space search.trials search.base
        search.sampler search.pruner search.cost search.startup search.reduction search.concurrency
        search.seed search.storage search.warm_start runtime.storage runtime.scratch runtime.ray runtime.address
        runtime.num_cpus runtime.workers runtime.threads runtime.reader_cpus runtime.object_store_mb
        runtime.loader_workers runtime.fleet runtime.min_workers runtime.cache_gb runtime.cpus_per_worker
        runtime.keep_parameters runtime.max_restarts runtime.time_limit runtime.stall_limit runtime.track
    """,
    "phases plan run": """
        experts.num distill.trajectory distill.endpoint_rule
        distill.start_rule distill.estimator
        distill.precision distill.reuse_graphs distill.loss distill.temperature distill.similarity.kind
        distill.similarity.rank distill.similarity.alpha distill.similarity.diagonal distill.similarity.clamp
        distill.steps distill.match_epochs distill.batch distill.batches distill.branches
        distill.skip_above distill.inner_dropout distill.optimiser distill.lr_image
        distill.lr_text distill.lr_similarity distill.lr_lr distill.momentum distill.inner_lr
        distill.inner_lr_text distill.min_inner_lr distill.ema distill.init distill.stored_size
        distill.init_augment distill.snapshots distill.seed
    """,
    "phases run": """
        distill.guard.every distill.guard.max_rate_growth distill.guard.dead_similarity
    """,
    "plan": """
        distill.plan.iterations distill.plan.max_phases distill.plan.min_iterations distill.plan.min_pairs
        distill.plan.reach distill.plan.reach_step distill.plan.min_straightness distill.plan.agreement
        distill.plan.min_starts distill.plan.endpoints distill.plan.experts distill.plan.draws
        distill.plan.every distill.plan.pace
    """,
    "plan run": """
        distill.plan.kind
    """,
    "run": """
        data.table.file data.table.image data.table.caption data.table.split data.webdataset.files
        data.webdataset.split_by_name data.parquet.files data.parquet.image data.parquet.caption
        data.parquet.split data.parquet.split_by_name data.split_fractions evaluate.students evaluate.order
        evaluate.schedule evaluate.lr evaluate.text_lr evaluate.temperature evaluate.eval_every evaluate.reference
        evaluate.scores evaluate.selection evaluate.chunk
    """,
}

WITHIN = {
    "amd.AMD.Options": "ranges starts",
    "choice.Choice": """
        method pairs bytes seed unit caption encoder space dtype draw start clusters quota guard guard_share expert
        never_learned
    """,
    "covmatch.CovMatch.Options": """
        texts rho mean_weight real_batch average reset lr_tower lr_head online_momentum weight_decay head_width chunk
    """,
    "data.Annotations": "train val test",
    "distill.Phase": "pairs start stop start_text stop_text grow_from grow_until endpoint iterations",
    "distribution.DistributionMethod.Options": "draws clip",
    "edge.Captioning": "kind id prompt tokens tries dtype",
    "edge.EDGE.Options": "clip captions_per_image captioner prefix tuning sampling",
    "edge_tuning.EdgeTuning": """
        epochs fraction steps batch micro_batch size lr contrast diverse anchor temperature unit_halves max_step
        weighting clamp recipe precision save_memory checkpoint_every
    """,
    "evlf.EVLF.Options": "fusion components mode sampler strength scheduler eta pull pull_until sampling",
    "evlf.LatentSampling": "size",
    "evlf_tuning.FusionRule": """
        width heads layers dropout kv residual reader_width epochs steps batch accumulate lr lr_reader weight_decay clip
        temperature align rebuild_low rebuild_high drop_text drop_entries text_noise flip checkpoint_every
    """,
    "lors.LoRS.Options": "rate_branches",
    "mct.MCT.Options": "anchors smooth_anchors start_points",
    "mdm.MDM.Options": """
        clip real_batch synthetic_batch cluster teacher partners alpha positive_cosine first_epoch resample_every
        teacher_dropout agreement discrepancy contrastive kernel sigma statistic root
    """,
    "ncfm.NCFM.Options": """
        clusters pick frequencies network network_norm network_optimiser lr_network repeat learned_scale w_amplitude
        w_phase scale real_batch subset project calibration calibration_batch patience chunk
    """,
    "pds.PDS.Options": """
        features rm_ratio starts normalize pairless rescale caption_pool repeats texts decode decoder steps guidance
        noise_level negative_prompt batch dtype offload
    """,
    "probes.ClassData": "source classes",
    "probes.Classes": "layout images file names synonyms number seed only",
    "probes.CocoQa": "folder questions seed",
    "probes.CocoQaData": "source layout cocoqa",
    "probes.Retrieval": "kind data split",
    "probes.Vqa": "kind data template question_mark caption_rule ks",
    "probes.ZeroShot": "kind data templates caption_rule ks",
    "repblend.RepBlend.Options": "blend",
    "search.Dimension": "uniform loguniform logint choice step when int",
    "stable_diffusion.Sampling": "steps guidance size batch dtype offload redraws",
    "tuned.TunedMethod.Options": "generator",
}
"""Fields inside lists, options and mappings, which the module `changing` cannot change; they declare no hashes."""
