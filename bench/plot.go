package main

import (
	"errors"
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// plot draws the report into a folder, which it makes: every picture as SVG and as PNG. It
// returns the files. What a report has no figures for is not drawn:
//
//	ratios            numastack / peer, per row
//	latency-ROW       percentiles, per peer
//	cycles-in, -out   cycles per byte of bulk rows against MTU, where there are several
func (rep *report) plot(dir string) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("-plot %q: must be a folder or a name for one: %w", dir, err)
	}
	pictures := []*picture{rep.ratioPlot(), rep.cyclesPlot(loadBulkIn), rep.cyclesPlot(loadBulkOut)}
	for _, r := range rep.Rows {
		pictures = append(pictures, rep.latencyPlot(r))
	}
	var files []string
	for _, pic := range pictures {
		if pic == nil {
			continue
		}
		if pic.err != nil {
			return files, fmt.Errorf("draw %s: %w", pic.name, pic.err)
		}
		for _, format := range []string{".svg", ".png"} {
			path := filepath.Join(dir, pic.name+format)
			if err := pic.write(path, format[1:]); err != nil {
				return files, fmt.Errorf("draw %s: %w", path, err)
			}
			files = append(files, path)
		}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("-plot %q: the result file has neither ratios nor latencies to draw", dir)
	}
	return files, nil
}

// picture is a plot with its file's name, without the format, and its size.
type picture struct {
	*plot.Plot
	name          string
	width, height vg.Length
	err           error // of add
}

func (rep *report) newPicture(name, title string, width, height vg.Length) *picture {
	plot.DefaultFont.Variant, plotter.DefaultFont.Variant = "Sans", "Sans"
	p := &picture{Plot: plot.New(), name: name, width: width, height: height}
	p.Title.Text = title + "\n" + rep.Environment.machine() + "\n" + rep.Environment.versions()
	p.Title.TextStyle.Font.Size = vg.Points(9)
	p.Title.Padding = vg.Points(6)
	for _, style := range []*text.Style{&p.X.Label.TextStyle, &p.Y.Label.TextStyle, &p.X.Tick.Label, &p.Y.Tick.Label, &p.Legend.TextStyle} {
		style.Font.Size = vg.Points(8)
	}
	p.Legend.Top = true
	p.Legend.Padding = vg.Points(2)
	return p
}

// write draws the picture with a margin: long names of rows reach beyond the axis's own.
func (p *picture) write(path, format string) error {
	canvas, err := draw.NewFormattedCanvas(p.width, p.height, format)
	if err != nil {
		return err
	}
	const margin = vg.Length(12)
	p.Draw(draw.Crop(draw.New(canvas), 2*margin, -2*margin, margin/2, -margin/2))
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = canvas.WriteTo(f)
	return errors.Join(err, f.Close())
}

// add draws what its constructor returned, or keeps the constructor's error.
func (p *picture) add(what plot.Plotter, err error) {
	if err != nil {
		p.err = errors.Join(p.err, err)
		return
	}
	p.Add(what)
}

// Colours that the colour-blind tell apart too (M. Okabe and K. Ito, "Color Universal
// Design", 2008), and shapes for print without colour.
var (
	peerColors = map[string]color.RGBA{
		peerNumastack: {0x00, 0x72, 0xB2, 0xff},
		peerKernel:    {0xE6, 0x9F, 0x00, 0xff},
		peerGVisor:    {0x00, 0x9E, 0x73, 0xff},
		peerGVisorGSO: {0xCC, 0x79, 0xA7, 0xff},
		peerLimit:     {0x00, 0x00, 0x00, 0xff},
	}
	otherColors = []color.RGBA{{0x56, 0xB4, 0xE9, 0xff}, {0xD5, 0x5E, 0x00, 0xff}}
	shapes      = []draw.GlyphDrawer{
		draw.CircleGlyph{}, draw.SquareGlyph{}, draw.TriangleGlyph{}, draw.CrossGlyph{}, draw.PlusGlyph{}, draw.RingGlyph{},
	}
)

// style returns the colour and the shape of a peer, the same in all pictures of a report.
func (rep *report) style(peer string) (color.RGBA, draw.GlyphDrawer) {
	peers := rep.peers()
	shape := shapes[slices.Index(peers, peer)%len(shapes)]
	if c, ok := peerColors[peer]; ok {
		return c, shape
	}
	others := slices.DeleteFunc(peers, func(p string) bool { _, ok := peerColors[p]; return ok })
	return otherColors[slices.Index(others, peer)%len(otherColors)], shape
}

// ratioPlot has a group of bars per row: how many times as good numastack is as each peer,
// on a logarithmic axis that begins at 1×. A black line across the bar of the kernel is
// where the device's limit would be.
func (rep *report) ratioPlot() *picture {
	others := slices.DeleteFunc(rep.peers(), func(p string) bool { return p == peerNumastack || p == peerLimit })
	slices.Reverse(others) // the axis goes upwards
	rows := slices.DeleteFunc(slices.Clone(rep.Rows), func(r rowReport) bool {
		return !slices.ContainsFunc(others, func(peer string) bool { return r.goodness(peerNumastack, peer) != nil })
	})
	if len(rows) == 0 {
		return nil
	}
	slices.Reverse(rows)
	rowHeight := vg.Points(11 * float64(max(2, len(others))))
	p := rep.newPicture("ratios", "numastack against its peers: how many times as good", 8*vg.Inch,
		vg.Points(110)+rowHeight*vg.Length(len(rows)))

	names := make([]string, len(rows))
	least, most := 0.0, 1.0
	thick := 0.8 / float64(len(others))
	bars := make([]*plotter.Polygon, len(others))
	for k, peer := range others {
		var rings []plotter.XYer
		var labels plotter.XYLabels
		for i, r := range rows {
			names[i] = r.Name
			ratio := r.goodness(peerNumastack, peer)
			if ratio == nil {
				continue
			}
			v := math.Log2(*ratio)
			low := float64(i) - 0.4 + float64(k)*thick
			rings = append(rings, plotter.XYs{{X: 0, Y: low}, {X: v, Y: low}, {X: v, Y: low + thick}, {X: 0, Y: low + thick}})
			labels.XYs = append(labels.XYs, plotter.XY{X: max(v, 0), Y: low + thick/2})
			labels.Labels = append(labels.Labels, " "+figure(ratio)+"×")
			least, most = min(least, v), max(most, v)
			if limit := r.goodness(peerLimit, peer); limit != nil && peer == peerKernel {
				v := math.Log2(*limit)
				line, err := plotter.NewLine(plotter.XYs{{X: v, Y: low}, {X: v, Y: low + thick}})
				p.add(line, err)
				least, most = min(least, v), max(most, v)
			}
		}
		if len(rings) == 0 {
			continue
		}
		polygon, err := plotter.NewPolygon(rings...)
		if err == nil {
			polygon.Color, _ = rep.style(peer)
			polygon.Width = vg.Points(0.3)
		}
		bars[k] = polygon
		p.add(polygon, err)
		values, err := plotter.NewLabels(labels)
		if err == nil {
			styleLabels(values)
		}
		p.add(values, err)
	}
	for k, bar := range slices.Backward(bars) {
		if bar != nil {
			p.Legend.Add("/ "+others[k], bar)
		}
	}
	if slices.Contains(rep.peers(), peerLimit) {
		line, err := plotter.NewLine(plotter.XYs{{X: 0, Y: 0}, {X: 0, Y: 0}})
		p.add(line, err)
		if err == nil {
			p.Legend.Add("limit of the device / kernel", line)
		}
	}

	p.NominalY(names...)
	p.X.Min, p.X.Max = math.Floor(least), math.Ceil(most+0.5)
	p.Y.Min, p.Y.Max = -0.6, float64(len(rows))+0.2*float64(len(rep.peers())) // room for the legend
	p.X.Tick.Marker = plot.TickerFunc(func(from, to float64) []plot.Tick {
		var ticks []plot.Tick
		for v := math.Ceil(from); v <= to; v++ {
			label := fmt.Sprintf("%.0f×", math.Exp2(v))
			if v < 0 {
				label = fmt.Sprintf("1/%.0f×", math.Exp2(-v))
			}
			ticks = append(ticks, plot.Tick{Value: v, Label: label})
		}
		return ticks
	})
	p.X.Label.Text = "figure of numastack / figure of the peer; inverse where lower is better"
	one, err := plotter.NewLine(plotter.XYs{{X: 0, Y: p.Y.Min}, {X: 0, Y: float64(len(rows)) - 0.4}})
	p.add(one, err)
	return p
}

func styleLabels(l *plotter.Labels) {
	for i := range l.TextStyle {
		l.TextStyle[i].Font.Size = vg.Points(7)
		l.TextStyle[i].YAlign = text.YCenter
	}
}

// goodness returns how many times as good one peer's figure is as another's, or nil.
func (rr rowReport) goodness(peer, base string) *float64 {
	if rr.Better == betterLower {
		peer, base = base, peer
	}
	ratio := rr.over(peer, base)
	if ratio == nil || !(*ratio > 0) || math.IsInf(*ratio, 0) {
		return nil
	}
	return ratio
}

// latencyPlot has a curve per peer over the percentiles that the row has. Nil without any.
func (rep *report) latencyPlot(r rowReport) *picture {
	points, byPeer := r.latencies()
	curves := map[string]plotter.XYs{}
	for peer, us := range byPeer {
		for i := range min(len(us), len(points)) {
			if us[i] > 0 {
				curves[peer] = append(curves[peer], plotter.XY{X: float64(i), Y: us[i]})
			}
		}
	}
	if len(curves) == 0 {
		return nil
	}
	names := make([]string, len(points))
	for i, q := range points {
		names[i] = "p" + strconv.FormatFloat(q, 'f', -1, 64)
		if q >= 100 {
			names[i] = "max"
		}
	}
	title := "latency, row " + r.Name
	if r.Rate > 0 {
		title += ", at " + whole(r.Rate) + " requests/s"
	}
	p := rep.newPicture("latency-"+r.Name, title, 7*vg.Inch, 4*vg.Inch)
	p.Legend.Left = true
	p.curves(rep, curves)
	p.NominalX(names...)
	p.X.Min, p.X.Max = -0.2, math.Max(1, float64(len(names))-0.8)
	p.logY("µs")
	return p
}

// latencies returns percentiles, 0 to 100, and the peers' latencies there in µs: the row's own
// curve where it has one.
func (rr rowReport) latencies() (points []float64, byPeer map[string][]float64) {
	if len(rr.CurvePoints) > 0 {
		return rr.CurvePoints, rr.Curve
	}
	byPeer = map[string][]float64{}
	for peer := range rr.P50 {
		byPeer[peer] = []float64{rr.P50[peer], rr.P99[peer], rr.Max[peer]} // 0 in old files: not drawn
	}
	return []float64{50, 99, 100}, byPeer
}

// cyclesPlot has a curve per peer over the MTUs of rows with one connection. Nil with
// fewer than two MTUs.
func (rep *report) cyclesPlot(bulk load) *picture {
	curves := map[string]plotter.XYs{}
	seen := map[int]bool{}
	for _, r := range rep.Rows {
		if r.Load != bulk || r.Conns != 1 || r.Door != doorEvents || r.CPUUnit != "cycles/byte" {
			continue
		}
		for peer, cycles := range r.CPU {
			if cycles > 0 && r.MTU > 0 {
				curves[peer] = append(curves[peer], plotter.XY{X: float64(r.MTU), Y: cycles})
				seen[r.MTU] = true
			}
		}
	}
	if len(seen) < 2 {
		return nil
	}
	direction := map[load]string{loadBulkIn: "in", loadBulkOut: "out"}[bulk]
	p := rep.newPicture("cycles-"+direction, "CPU of the server, bulk "+direction+", 1 connection", 7*vg.Inch, 4*vg.Inch)
	for _, c := range curves {
		slices.SortFunc(c, func(a, b plotter.XY) int { return int(a.X - b.X) })
	}
	p.curves(rep, curves)
	var ticks plot.ConstantTicks
	for mtu := range seen {
		ticks = append(ticks, plot.Tick{Value: float64(mtu), Label: strconv.Itoa(mtu)})
	}
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, ticks
	p.X.Label.Text = "MTU, bytes"
	p.logY("cycles per byte")
	return p
}

// curves adds a line with points per peer, in the order of the report.
func (p *picture) curves(rep *report, curves map[string]plotter.XYs) {
	for _, peer := range rep.peers() {
		if len(curves[peer]) == 0 {
			continue
		}
		line, points, err := plotter.NewLinePoints(curves[peer])
		if err != nil {
			p.err = err
			return
		}
		line.Color, points.Shape = rep.style(peer)
		line.Width, points.Color, points.Radius = vg.Points(1.5), line.Color, vg.Points(3)
		p.Add(line, points)
		p.Legend.Add(peer, line, points)
	}
}

// logY makes the axis logarithmic with room for the legend above, ticks at 1, 2 and 5.
func (p *picture) logY(label string) {
	p.Y.Label.Text = label
	p.Y.Min, p.Y.Max = p.Y.Min/1.2, p.Y.Max*3
	p.Y.Scale = plot.LogScale{}
	p.Y.Tick.Marker = plot.TickerFunc(func(from, to float64) []plot.Tick {
		var ticks []plot.Tick
		for decade := math.Pow(10, math.Floor(math.Log10(from))); decade <= to; decade *= 10 {
			for _, m := range []float64{1, 2, 5} {
				if v := m * decade; v >= from && v <= to {
					ticks = append(ticks, plot.Tick{Value: v, Label: strconv.FormatFloat(v, 'f', -1, 64)})
				}
			}
		}
		return ticks
	})
}
