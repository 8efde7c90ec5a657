# ruff: noqa
"""How the candidate flows were trained: BASE and DIST in seconds, OUT a folder; run from the root."""

import os, sys, time, json, math

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
T0 = time.time()
import numpy as np, torch, torch.nn.functional as F, torch.multiprocessing as mp

sys.path.insert(0, os.getcwd())
OUT = os.environ["OUT"]
BASE = float(os.environ.get("BASE", "170"))
DIST = float(os.environ.get("DIST", "90"))
N = int(os.environ.get("N", "200000"))
B = int(os.environ.get("B", "1024"))
TRY = int(os.environ.get("TRY", "500"))


def say(*a):
    print(f"[{time.time() - T0:6.1f}]", *a, flush=True)


def part(job):
    seed, size, count = job
    torch.set_num_threads(1)
    from fluxedu.nano.scenes import sample_scene, render, caption
    from fluxedu.nano.training.latents import Tokens, FULLER

    rng = np.random.default_rng([993, seed])
    sc = [
        sample_scene(rng, size=size, count=int(rng.choice([1, 2, 3], p=FULLER)) if rng.random() < 0.6 else None)
        for _ in range(count)
    ]
    im = np.stack([render(s) for s in sc])
    tx = [caption(s, rng)[0] for s in sc for _ in range(2)]
    t5, clip = Tokens()(tx)
    return size, torch.from_numpy(im), t5.to(torch.int16).view(count, 2, -1), clip.to(torch.int16).view(count, 2, -1)


def exam(job):
    name, which = job
    torch.set_num_threads(1)
    import fluxedu as fe
    from fluxedu.nano.exam import questions
    from fluxedu.nano.judge import judge
    from fluxedu.sampling.load import load, SHIPPED
    from safetensors.torch import load_file

    pipe = load(name)
    pipe.flux.load_state_dict(load_file(f"{OUT}/{name}.safetensors"), strict=True)
    qs = questions(TRY)
    out = []
    for i in which:
        q = qs[i]
        p = pipe(q.prompt, seed=q.seed, height=q.size[0], width=q.size[1], trajectory=False, progress=False).images[0]
        out.append((q.size, judge(p, q.claim)))
    return out


def main():
    from fluxedu.nano.scenes import ASPECTS
    from fluxedu.nano import configs
    from fluxedu.nano.training.flow import NOISY, DROPOUT, GUIDANCE
    from fluxedu.nano.training.muon import Muon
    from fluxedu.nano.training.loop import parameter_groups
    from fluxedu.nano.training.latents import Tokens
    from fluxedu.sampling.load import load
    from fluxedu.sampling.latents import pack, image_ids, text_ids
    from safetensors.torch import save_file

    torch.manual_seed(5)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(True)
    dev = "cuda" if torch.cuda.is_available() else "cpu"
    base = load("nano-base")
    student = load("nano").flux
    teacher = base.flux
    from safetensors.torch import load_file

    teacher.load_state_dict(load_file(".gpu/w/nano-base.safetensors"))
    student.load_state_dict(load_file(".gpu/w/nano.safetensors"))
    for m in (teacher, student, base.prompt_encoder.t5, base.prompt_encoder.clip, base.autoencoder):
        m.to(dev)
    t5, clip, ae = base.prompt_encoder.t5, base.prompt_encoder.clip, base.autoencoder
    say("loaded", dev)
    per = max(1, N // (7 * 60))
    jobs = [(i * 7 + j, s, per) for i in range(60 if N > 5000 else 2) for j, s in enumerate(ASPECTS)]
    data = {s: [] for s in ASPECTS}
    with mp.get_context("spawn").Pool(15 if dev == "cuda" else 2) as pool, torch.no_grad():
        for size, im, a, b in pool.imap_unordered(part, jobs):
            x = im.to(dev).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast(dev, torch.bfloat16, enabled=dev == "cuda"):
                z = torch.cat([ae.encode(c).float() for c in x.split(256)])
            data[size].append((pack(z).half(), a.to(dev), b.to(dev)))
    data = {s: tuple(torch.cat(c) for c in zip(*v)) for s, v in data.items()}
    say("data", {s: len(v[0]) for s, v in data.items()})
    e5, ec = (x.to(dev) for x in Tokens()([""]))
    g = torch.Generator(dev).manual_seed(8)
    rng = np.random.default_rng(8)
    weights = np.array([len(v[0]) for v in data.values()], float)
    sizes = list(data)
    weights[sizes.index((128, 128))] *= 0.15
    weights /= weights.sum()

    def batch():
        s = sizes[rng.choice(len(sizes), p=weights)]
        z, a, b = data[s]
        r = torch.randint(len(z), (B,), device=dev, generator=g)
        c = torch.randint(2, (B,), device=dev, generator=g)
        x0 = z[r].float()
        t = torch.sigmoid(NOISY[0] + NOISY[1] * torch.randn(B, device=dev, generator=g))
        n = torch.randn(x0.shape, device=dev, generator=g)
        tt = t[:, None, None]
        return (
            (1 - tt) * x0 + tt * n,
            t,
            n - x0,
            a[r, c].long(),
            b[r, c].long(),
            image_ids(s[0] // 8, s[1] // 8).to(dev),
            text_ids(32).to(dev),
        )

    def texts(i5, ic):
        with torch.no_grad():
            return t5(i5), clip(ic)[1]

    def run(model, loss, seconds, lr, name, ema=0.998):
        model.train().requires_grad_(True)
        mats, rest = parameter_groups(model, True)
        opts = [
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=dev == "cuda"),
            Muon(mats, lr, 0.01, torch.bfloat16 if dev == "cuda" else torch.float32),
        ]
        params = list(model.parameters())
        avg = [p.detach().clone() for p in params]
        start = time.time()
        step = 0
        shown = 0.0
        while True:
            done = (time.time() - start) / seconds
            if done >= 1:
                break
            rate = min(1.0, (step + 1) / 100, (1 - done) / 0.6)
            for o in opts:
                for q in o.param_groups:
                    q["lr"] = lr * rate
            l = loss()
            l.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            for o in opts:
                o.step()
                o.zero_grad(set_to_none=True)
            step += 1
            torch._foreach_lerp_(avg, [p.detach() for p in params], 1 - min(ema, (1 + step) / (10 + step)))
            if step % 20 == 0:
                shown = 0.7 * shown + 0.3 * float(l.detach()) if shown else float(l.detach())
            if step % 200 == 0:
                say(name, step, f"loss {shown:.5f} rate {rate:.2f}")
        with torch.no_grad():
            for p, a in zip(params, avg):
                p.copy_(a)
        model.eval().requires_grad_(False)
        save_file(
            {k: v.detach().to(torch.bfloat16).cpu().contiguous() for k, v in model.state_dict().items()},
            f"{OUT}/{name}.safetensors",
        )
        say(name, "steps", step, f"loss {shown:.5f}")
        return step

    def compiled(m):
        if dev == "cuda" and os.environ.get("COMPILE", "1") == "1":
            for blk in (*m.double_blocks, *m.single_blocks):
                blk.compile(dynamic=True)

    bf = lambda: torch.autocast(dev, torch.bfloat16, enabled=dev == "cuda")

    def flow_loss():
        x, t, v, a, b, ii, ti = batch()
        drop = torch.rand(B, 1, device=dev, generator=g) < DROPOUT
        with bf():
            txt, p = texts(torch.where(drop, e5, a), torch.where(drop, ec, b))
            out = teacher(x, ii, txt.float(), ti, t, p.float())
        return F.mse_loss(out.float(), v)

    def dist_loss():
        x, t, _, a, b, ii, ti = batch()
        s = 1 + 5.5 * torch.rand(B, device=dev, generator=g)
        with bf():
            txt, p = texts(a, b)
            no, np_ = (y.expand(B, *y.shape[1:]) for y in texts(e5, ec))
            with torch.no_grad():
                both = teacher(torch.cat([x, x]), ii, torch.cat([no, txt]), ti, t.repeat(2), torch.cat([np_, p]))
            e, c = both.float().chunk(2)
            target = e + s[:, None, None] * (c - e)
            out = student(x, ii, txt, ti, t, p, s)
        return F.mse_loss(out.float(), target)

    teacher.train().requires_grad_(True)
    try:
        compiled(teacher)
        flow_loss().backward()
        teacher.zero_grad()
        say("compiled")
    except Exception as e:
        say("no compile", repr(e)[:300])
        torch._dynamo.reset()
        torch._dynamo.config.disable = True
    sb = run(teacher, flow_loss, BASE, float(os.environ.get("LR", "1e-3")), "nano-base")
    if not getattr(torch._dynamo.config, "disable", False):
        compiled(student)
    sd = run(student, dist_loss, DIST, 1e-3, "nano", ema=0.995)
    json.dump(
        {"base_steps": sb, "dev_steps": sd, "batch": B, "scenes": sum(len(v[0]) for v in data.values())},
        open(f"{OUT}/told.json", "w"),
    )
    del data
    from fluxedu.nano.judge import summary
    from fluxedu.nano.scenes import ASPECTS

    with mp.get_context("spawn").Pool(16 if dev == "cuda" else 2) as pool:
        k = 16
        for name in ("nano-base", "nano"):
            got = sum(pool.map(exam, [(name, range(i, TRY, k)) for i in range(k)]), [])
            rows = summary(v for _, v in got)
            by = {s: summary(v for z, v in got if z == s)["everything"]["percent"] for s in ASPECTS}
            say(name, {r: round(c["percent"], 1) if c["percent"] is not None else None for r, c in rows.items()})
            say(by)
            sq = by[ASPECTS[0]]
            ot = [v.everything for z, v in got if z != ASPECTS[0]]
            say("square", sq, "others", 100 * np.mean(ot))


if __name__ == "__main__":
    main()
